"""The link: what crosses between edge and cloud, how it is coded, and how many bytes it took."""
