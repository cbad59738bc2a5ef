"""The installer: puts the plugin on the node and into the runtime's chain, and takes both out."""
