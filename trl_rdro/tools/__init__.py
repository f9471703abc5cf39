"""What a command computes, usable from Python too: scores, memory estimates, inspection, plots. The commands around
them are in `trl_rdro.cli`."""
