"""Two models of the same network on Fashion-MNIST, a flow and a variance-preserving one."""
