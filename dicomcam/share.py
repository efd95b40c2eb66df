"All that hands heatmaps on, under the name it had in 0.1."
from .objects import *
from .pictures import *
from .report import *
