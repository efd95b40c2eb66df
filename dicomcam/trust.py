"All that judges heatmaps, under the name it had in 0.1."
from .data import *
from .measures import *
from .localize import *
from .faithful import *
from .road import *
