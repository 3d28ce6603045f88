"""Split fine-tuning: edge and cloud train one model together and exchange only hidden states and their gradients."""
