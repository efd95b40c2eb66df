__version__ = "0.2.0"

import warnings as _w
# torch >= 2.15 warns about torch.jit.script wherever fastai is imported; nothing that a user of either can mend
_w.filterwarnings('ignore', message='.*torch.jit.script.* is deprecated', category=FutureWarning)
