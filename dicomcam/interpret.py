"All that reads results, under the name it had in 0.1."
from .intervals import *
from .results import *
from .subgroups import *
from .plots import *
