"""More than one core: data-path processes, and the control process that feeds them."""
