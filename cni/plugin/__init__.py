"""The CNI plugin: one process per pod and command, standard library only."""
