"""What holds for a run as a whole: whole files, whole checkpoints, one run per directory, known settings, an orderly
end. Nothing here knows of a loss or a model."""
