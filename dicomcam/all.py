"All of dicomcam, and fastai's vision and medical imaging below it: `from dicomcam.all import *`. Where names meet, dicomcam's win."
import dicomcam
from fastai.vision.all import *
from fastai.medical.imaging import *
from dicomcam.data import *
from dicomcam.dicom import *
from dicomcam.pil import *
from dicomcam.summary import *
from dicomcam.train import *
from dicomcam.interpret import *
from dicomcam.cam import *
from dicomcam.gradcam import *
from dicomcam.trust import *
from dicomcam.share import *
from dicomcam.cli import run_demo
