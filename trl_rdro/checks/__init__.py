"""What is looked at before a model is loaded: the rows of data sets, and the files of models."""
