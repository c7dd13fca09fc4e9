"""One module a paper: how each class named in a golden file is built, loaded and run here."""
