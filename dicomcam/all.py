"""All of dicomcam, and fastai's vision and medical imaging below it: `from dicomcam.all import *`. Where names meet,
dicomcam's win."""
import dicomcam
from fastai.vision.all import *
from fastai.medical.imaging import *
from dicomcam.phi import *
from dicomcam.phantom import *
from dicomcam.pairs import *
from dicomcam.data import *
from dicomcam.summary import *
from dicomcam.volume import *
from dicomcam.dicom import *
from dicomcam.pil import *
from dicomcam.train import *
from dicomcam.chest import *
from dicomcam.interpret import *
from dicomcam.planes import *
from dicomcam.prior import *
from dicomcam.heatmaps import *
from dicomcam.layouts import *
from dicomcam.layers import *
from dicomcam.items import *
from dicomcam.classifier import *
from dicomcam.explain import *
from dicomcam.cam import *
from dicomcam.gradcam import *
from dicomcam.perturb import *
from dicomcam.gradients import *
from dicomcam.smooth import *
from dicomcam.attribution import *
from dicomcam.trust import *
from dicomcam.choice import *
from dicomcam.froc import *
from dicomcam.protocols import *
from dicomcam.share import *
from dicomcam.team import *
from dicomcam.folder import *
from dicomcam.demo import *
