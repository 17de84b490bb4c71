"""The Space: a page on the Hub that searches public documents; `python -m model_cards.space.build` makes its folder."""
