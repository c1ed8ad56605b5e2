"""The words that the three worlds are made of: few, since a tiny model learns to read each of them."""

from __future__ import annotations

TOWNS = "Basel Bonn Cairo Delft Genoa Graz Hanoi Kyoto Lima Lyon Nice Oslo Paris Riga Rome Turin".split()

# A library's: 256 titles, and as many names
COLOURS = "Amber Black Blue Brown Coral Crimson Gold Green Grey Ivory Jade Lilac Navy Olive Pink Red".split()
THINGS = "Bridge Candle Door Field Forest Garden Harbour Hill House Island Key Lake Lamp Moon River Ship".split()
FIRST = "Ada Ben Cleo Dov Eva Finn Gina Hugo Ida Jon Kira Leo Mia Noa Otto Pia".split()
LAST = "Berg Cole Dahl Eck Frost Gray Holm Iver Kern Lund Moss Nash Olsen Park Reed Stone".split()
BOOKS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
AUTHORS = [f"{first} {last}" for first in FIRST for last in LAST]

# A table's: what its columns may be called
PLACES = "city location place site station town".split()
AMOUNTS = "amount cost count price sales weight".split()

# A shop's
GOODS = "bag bowl chair clock coat hat lamp rug scarf vase".split()
PARTS = {
    "colour": "black blue brown green grey pink red white".split(),
    "size": "huge large long narrow short small tall wide".split(),
    "material": "cotton glass iron leather linen paper silk wool".split(),
}
