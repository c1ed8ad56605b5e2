"""What `examples/demo.py` is made of: data from templates, a tiny model, the code tool, and
held-out questions.
"""
