"All that reads a DICOM file, under the name it had in 0.1: `read`, `decode` and `pixels`."
from .read import *
from .decode import *
from .pixels import *

def __getattr__(name):
    "`PILDicom` and `TensorDicom`, when somebody asks: they need fastai, which takes seconds to import."
    if name not in ('PILDicom', 'TensorDicom'): raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from . import pil
    return getattr(pil, name)
