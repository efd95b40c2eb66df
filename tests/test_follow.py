"Does a map follow the model? Forest plots, ROAD, agreement with occlusion, weights drawn anew, and localisation beside all of it."
import numpy as np, pandas as pd, pytest
from matplotlib import pyplot as plt

from dicomcam.plots import plot_forest, plot_forests

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

# forest plots

def table_of(**columns): return pd.DataFrame(columns, pd.Index(['gradcam', 'gradcam', 'noise'], name='map'))

def test_a_forest_has_a_row_for_each_row():
    "Names are the index and what stands left of the value; the ends are those of the table; maps that know nothing are grey"
    table = table_of(layer=['6', '7', ''], mean=[.8, .4, .1], low=[.7, np.nan, 0], high=[.9, np.nan, .3], n=9)
    ax = plot_forest(table, title='pointing', line=.1)
    assert [o.get_text() for o in ax.get_yticklabels()] == ['gradcam 6', 'gradcam 7', 'noise'] and ax.get_title() == 'pointing'
    (points, _, (bars,)), (grey, _, (grey_bars,)) = ax.containers
    assert points.get_xydata().tolist() == [[.8, 0], [.4, 1]] and grey.get_xydata().tolist() == [[.1, 2]] and grey.get_color() == 'gray'
    assert np.allclose([o[:, 0] for o in bars.get_segments()], [[.7, .9], [.4, .4]]) and np.allclose(grey_bars.get_segments()[0][:, 0], [0, .3])
    assert ax.get_ylim() == (2.5, -.5) # the first row on top

def test_a_forest_of_any_table():
    "Another value, several levels of names, the axes given, a name that matplotlib would set as a formula"
    ax = plt.subplots()[1]
    index = pd.MultiIndex.from_tuples([('$a_1$', 1)])
    assert plot_forest(pd.DataFrame(dict(accuracy=[.5], low=.4, high=.6), index), ax) is ax
    assert ax.get_yticklabels()[0].get_text() == r'\$a_1\$ 1'
    with pytest.raises(KeyError, match='low'): plot_forest(pd.DataFrame(dict(mean=[.5])))
    with pytest.raises(ValueError, match='a value left of low'): plot_forest(pd.DataFrame(dict(low=[.5], high=1)))

def test_several_measures_side_by_side():
    table = table_of(mean=[.8, .4, .1], low=[.7, .2, 0], high=[.9, .5, .3])
    fig = plot_forests(dict(mass=table, deletion=table), dict(deletion='small is good'))
    assert [o.get_title() for o in fig.axes] == ['mass', 'deletion'] and [o.get_xlabel() for o in fig.axes] == ['', 'small is good']
