"""The colours of figures and films: Okabe and Ito's, distinct for all common colour vision."""

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#8C8C8C"
PALETTE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
