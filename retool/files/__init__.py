"""Files of others, read with care; files of ours, written so that they last."""
