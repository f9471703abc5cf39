"""Training configurations: TRL's, with the fields of our losses, each validated when the configuration is built."""
