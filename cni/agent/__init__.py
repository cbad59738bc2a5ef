"""The node agent: enrols pods and feeds the node proxy."""
