"""What is promised of Penstock on Kubernetes, one module for each part of it, in the order in which one comes to it."""
