"""The commands of ``ocm``, a module each: options in, JSON and pictures out."""
