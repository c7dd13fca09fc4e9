"""Complete task systems: model, data, training, evaluation and prediction behind one command."""
