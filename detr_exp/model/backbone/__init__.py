"""Image to list of maps; each backbone has out_channels and out_strides."""
