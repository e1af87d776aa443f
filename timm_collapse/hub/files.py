"""The files of a saved model: all that lies beside its weights, here and on the Hub.

Nothing of the package but the errors is imported here.
"""

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
"""What timm reads."""
RECIPE_FILE = "recipe.json"
"""How it was trained, and what was measured."""
BANK_FILE = "order_bank.safetensors"
"""A generator's orders."""
SETTINGS_FILE = "orderer.json"
"""A saved orderer: how it ranks."""
ORDERER_FOLDER = "orderer"
"""A collapsed model's orderer, a saved model of its own."""
CARD_FILE = "README.md"
PICTURES = ("samples.png", "kept.png", "order.png")
"""Of the card."""
PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, RECIPE_FILE, CARD_FILE, BANK_FILE, SETTINGS_FILE, ORDERER_FOLDER, *PICTURES)
"""All that a published folder can hold."""
