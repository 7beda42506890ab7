"""What models are: specs (specs/*.toml), their language, a checkpoint read by one."""
