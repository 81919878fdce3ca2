"""Training one network over devices and many processes."""
