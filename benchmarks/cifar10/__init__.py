"""The experiment on CIFAR-10: sizes, training, evaluation, and the parts that are on disk."""
