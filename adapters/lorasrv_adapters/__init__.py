"""What an adapter is: file formats, one normal form for every method, and an adapter's life on host and device.

It knows no model class and no server. A base model is seen only through `base.BaseModel`.
"""
