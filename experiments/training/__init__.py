"""Data sets, networks, and the loop that trains many of them at once.

`data` knows the data sets by name; a file each reads a format or a source (`idx`, `cifar`, `hub`, `debian`,
`mnist_wheel`). `models`, `resnet` and `conv_chain` are networks of any norm, `equal_layers`, `equal_blocks`,
`random_chains`, `towers` and `switched_towers` deep ones. `loop` trains; what it finds is kept by
`experiments.framework.grid`. Nothing here knows of an experiment: add networks and data sets, not claims.
"""
