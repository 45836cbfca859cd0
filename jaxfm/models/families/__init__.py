"""The model families, one file each; `jaxfm.models` exports their configs and factories."""
