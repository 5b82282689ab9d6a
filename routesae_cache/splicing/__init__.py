"""The model run with reconstructions in the residuals' place."""
