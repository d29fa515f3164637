"""Learning: training graphs, central training, quantization, bundles."""
