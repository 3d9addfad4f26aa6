"""A fit beside something else: NUTS, other fits, simulated data, a whole suite of models.

`nuts` makes references, `compare` holds fits against them, `calibrate` fits data simulated from the
model itself, `suite` runs models x guides x objectives. What a fit says of itself is in
`posterior.diagnostics`.
"""
