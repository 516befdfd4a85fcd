"""What all plots share: matplotlib without a screen, axes, saving."""
from contextlib import contextmanager

import numpy as np

from nanop.errors import import_optional


@contextmanager
def figure(path, rows=1, columns=1, size=(7, 4.2), dpi=140, **options):
    """Yield (figure, axes, an array of rows x columns) to draw on, and save the figure to `path`."""
    import_optional('matplotlib', 'a plot').use('Agg')
    from matplotlib import pyplot
    drawn, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained', **options)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[['top', 'right']].set_visible(False)
    try:
        yield drawn, axes
        drawn.savefig(path, dpi=dpi)
    finally:
        pyplot.close(drawn)


def colors(count, name='viridis', last=0.88):
    """`count` colors of a colormap, dark to light."""
    from matplotlib import pyplot
    return pyplot.get_cmap(name)(np.linspace(0, last, max(1, count)))
