"All that training takes, under the name it had in 0.1."
from .labels import *
from .view import *
from .cache import *
from .batches import *
from .weights import *
from .networks import *
from .checkpoints import *
from .models import *
from .training import *
