"""Pictures: equal swarms give equal files, and nothing is too small to draw."""

from xml.etree import ElementTree

import numpy as np
import pytest

from bsns.topology.distance import distances
from bsns.topology.persistence import node_entries, persistence
from bsns.topology.plots import topology_svg
from bsns.topology.synthetic import synthetic


@pytest.mark.parametrize("nodes", [1, 25])
def test_pictures_are_svg_and_repeat_to_the_byte(nodes):
    def drawn():
        swarm = synthetic("uniform", nodes, np.random.default_rng(1))
        matrix = distances(swarm).matrix_MM
        return topology_svg(persistence(matrix), persistence(matrix, node_entries(swarm.nodes)), f"{nodes} nodes")

    picture = drawn()
    assert picture == drawn()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert f"{nodes} nodes".encode() in picture
