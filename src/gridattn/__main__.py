"""`python -m gridattn`: the command line."""

from gridattn.cli import main

if __name__ == "__main__":
    main()
