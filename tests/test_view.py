"An image on its way to the network's input, and a map of that input on its way back"
import cv2, numpy as np, pandas as pd, pydicom, pytest, torch
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from tiny import make_tiny

from dicomcam.batches import dicom_dls
from dicomcam.cam import cam
from dicomcam.heatmaps import Heatmaps
from dicomcam.maps import upsample
from dicomcam.pixels import dicom_pixels
from dicomcam.view import Placement, View, fit_image

METHODS = 'pad', 'crop', 'squish'

def shapes(n, seed):
    "Random (rows, columns, size)"
    g = np.random.default_rng(seed)
    return [tuple(int(o) for o in (*g.integers(40, 500, 2), g.integers(24, 200))) for _ in range(n)]

def fit_of_01(x, size, method):
    "What version 0.1 did to the pixels of an image, word for word: cached images and predictions of its model files rest on it"
    h, w = x.shape
    if method == 'crop':
        m = min(h, w)
        x = x[(h-m)//2:(h+m)//2, (w-m)//2:(w+m)//2]
    rows, cols = (max(1, round(o*size/max(h, w))) for o in (h, w)) if method == 'pad' else (size, size)
    x = cv2.resize(np.ascontiguousarray(x), (cols, rows), interpolation=cv2.INTER_AREA if rows < h else cv2.INTER_LINEAR)
    out, y0, x0 = np.zeros((size, size), np.uint16), (size-rows)//2, (size-cols)//2
    out[y0:y0+rows, x0:x0+cols] = x.clip(0, 1)*65535+.5
    return out

@pytest.mark.parametrize('method', METHODS)
def test_there_is_what_version_01_did(method, folder):
    g = np.random.default_rng(0)
    for rows, cols, size in [*shapes(40, 1), (64, 64, 64), (3, 400, 30), (400, 3, 30), (20, 30, 90), (300, 40, 90), (40, 300, 90)]:
        x = g.random((rows, cols), np.float32)
        assert np.array_equal(View(size, method).there(x), fit_of_01(x, size, method)), (rows, cols, size)
    film = next((folder/'train').rglob('*.dcm'))
    x = dicom_pixels(film, size=48)
    assert np.array_equal(fit_image(film, 48, method), fit_of_01(x, 48, method))
    narrow = x[:, 5:35]
    assert np.array_equal(fit_image(narrow, 48, method), fit_of_01(narrow, 48, method))

def ramps(rows, cols):
    "For each pixel the row and the column of its centre, as shares of the longer side"
    ys, xs = np.mgrid[:rows, :cols] + .5
    return ys/max(rows, cols), xs/max(rows, cols)

def errors(view, way_back, rows, cols):
    "How far, in pixels of the network's input, each inner pixel's row and column are off after there and back"
    x, y, width, height = (int(o) for o in view.place(rows, cols)[0])
    step = view.seen(rows, cols)[2]/view.size, view.seen(rows, cols)[3]/view.size # pixels of the original for one of the input
    margin = int(2*max(step))+1 # at the very edge nothing can be interpolated
    inner = slice(y+margin, y+height-margin), slice(x+margin, x+width-margin)
    res = []
    for ramp, one in zip(ramps(rows, cols), step[::-1]):
        back = way_back(torch.from_numpy(view.there(ramp)/65535.), rows, cols).numpy()
        res.append(np.abs(back-ramp)[inner].max()*max(rows, cols)/one)
    return max(res)

def by_resize(view, rows, cols):
    "The way back that 0.1 took: the box of fastai's `Resize`, in whole pixels of the original"
    if view.method == 'squish': return 0, 0, cols, rows
    side = (max if view.method == 'pad' else min)(rows, cols)
    return int(.5*(cols-side)), int(.5*(rows-side)), side, side

def back_of_01(view):
    def back(m, rows, cols):
        x, y, w, h = by_resize(view, rows, cols)
        m, out = upsample(m, (h, w)), torch.zeros(rows, cols)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x+w, cols), min(y+h, rows)
        out[y0:y1, x0:x1] = m[y0-y:y1-y, x0-x:x1-x]
        return out
    return back

@pytest.mark.parametrize('method', METHODS)
def test_there_and_back_again(method):
    "A ramp comes back to within a twentieth of a pixel of the network's input"
    for rows, cols, size in [(o, *p) for o, *p in shapes(40, 2) if o > 100 and p[0] > 100]:
        size = min(size, rows//2, cols//2) # shrunk, by averaging
        view = View(size, method)
        assert errors(view, view.back, rows, cols) < .05, (rows, cols, size)

def test_the_way_back_of_01_missed_padded_films():
    "The test above can tell: half a pixel of the input, where the film is an odd number of them wide"
    rows, cols, view = 400, 256, View(64)
    assert errors(view, view.back, rows, cols) < .05
    assert errors(view, back_of_01(view), rows, cols) > .4

@pytest.mark.parametrize('method', METHODS)
def test_square_images_as_ever(method):
    m = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for side in (30, 64, 101): torch.testing.assert_close(View(64, method).back(m, side, side), upsample(m, (side, side)), rtol=1e-5, atol=1e-5)

def test_squished_images_as_ever():
    m = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(View(64, 'squish').back(m, 90, 201), upsample(m, (90, 201)), rtol=1e-5, atol=1e-5)

def test_crop_hides_the_sides():
    back = View(32, 'crop').back(torch.ones(4, 4), 100, 61)
    assert back.shape == (100, 61) and back[19:80].eq(1).all() and back.sum() == 61*61
    assert View(32, 'crop').back(torch.ones(3, 4, 4), 50, 80)[..., :15].eq(0).all()

def test_box_of_the_image_and_box_of_the_input():
    assert View(64, 'pad').place(100, 50) == ((0, 0, 50, 100), (16, 0, 32, 64))
    assert View(64, 'crop').place(101, 50) == ((0, 25, 50, 50), (0, 0, 64, 64))
    assert View(64, 'squish').place(100, 50) == ((0, 0, 50, 100), (0, 0, 64, 64))
    assert View(64, 'pad').place(1000, 1) == ((0, 0, 1, 1000), (31, 0, 1, 64))

def test_what_the_input_spans():
    assert View(64, 'pad').seen(100, 50) == (-25, 0, 100, 100)
    assert View(64, 'crop').seen(101, 50) == (0, 25, 50, 50)
    assert View(64, 'squish').seen(100, 50) == (0, 0, 50, 100)
    x, y, width, height = View(64, 'pad').seen(400, 252) # 40 pixels wide, 12 on either side
    assert (x, y, width, height) == pytest.approx((-75.6, 0, 403.2, 400))

def test_a_placement_says_where():
    class Half(Placement):
        "The left half of the image, in the middle of the input"
        size = 2
        def place(self, rows, cols): return (0, 0, cols//2, rows), (.5, .5, 1, 1)
    assert Half().seen(10, 20) == (-5, -5, 20, 20)
    back = Half().back(torch.ones(4, 4), 10, 20)
    assert back[:, :10].eq(1).all() and back[:, 10:].eq(0).all()

# from a file to the network and back on the file's pixels

def film(fn, pixels, patient):
    "Write an uncompressed 8-bit film"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = SecondaryCaptureImageStorage, generate_uid(), patient
    ds.set_pixel_data(pixels, 'MONOCHROME2', 8)
    ds.save_as(fn, enforce_file_format=True)
    return fn

@pytest.mark.parametrize('method', METHODS)
def test_heatmaps_lie_on_the_film(method, tmp_path):
    "The network's own input, taken for a map, lies on a narrow film again: to a fifth of a pixel of the input"
    rows, cols = 300, 212 # padded to 45 columns of 64
    y, x = np.mgrid[:rows, :cols]
    blob = np.exp(-((y-170)**2+(x-80)**2)/2/15**2)
    files = [film(tmp_path/f'{i}.dcm', np.uint8(255*blob+.5), str(i)) for i in range(6)]
    table = pd.DataFrame(dict(file=[o.name for o in files], label=list('ababab')))
    learn = make_tiny(dicom_dls(tmp_path, table, size=64, method=method, cache=False))
    h = cam(learn, files[:2])
    assert h.view == View(64, method) and h.where(0)[:2] == (rows, cols)
    m = Heatmaps([h.images], h.images, h.probs[:, :1], ['a'], ['in'], 'input', h.items, h.view).native(0, 'a').numpy()
    across, down = h.view.seen(rows, cols)[2]/64, h.view.seen(rows, cols)[3]/64
    assert abs((m*y).sum()/m.sum()-170) < .2*down and abs((m*x).sum()/m.sum()-80) < .2*across
    assert m.sum() == pytest.approx(blob.sum(), rel=.02)
