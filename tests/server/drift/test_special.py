"""Tails and quantiles against stored 50-digit values, and their laws. Vectors and properties.

Provenance of every vector: mpmath 1.4.1 with 50 decimal digits, from the definitions (incomplete
gamma and beta functions, theta series, bisection of the error function), rounded to 17 digits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.drift import special

CHI_SQUARE = [  # (x, freedom, tail)
    (0.01, 1, 0.92034432544594204),
    (0.5, 1, 0.47950012218695346),
    (0.95, 1, 0.32971929731267901),
    (1.5, 1, 0.22067136191984679),
    (1.1, 1, 0.29426610430496287),
    (3, 1, 0.083264516663550402),
    (0.02, 2, 0.99004983374916805),
    (1.0, 2, 0.60653065971263342),
    (1.9, 2, 0.38674102345450122),
    (2.5, 2, 0.2865047968601901),
    (2.2, 2, 0.33287108369807952),
    (3.0, 2, 0.22313016014842983),
    (6, 2, 0.049787068367863943),
    (0.037000000000000005, 3.7, 0.99964829995076789),
    (1.85, 3.7, 0.7213355072148758),
    (3.515, 3.7, 0.42889552342264016),
    (4.2, 3.7, 0.33685847858491759),
    (4.07, 3.7, 0.3529811467212819),
    (5.550000000000001, 3.7, 0.20314173324746002),
    (11.100000000000001, 3.7, 0.020284687594601755),
    (0.1, 10, 0.99999999750204866),
    (5.0, 10, 0.89117801891415124),
    (9.5, 10, 0.48539755777859671),
    (10.5, 10, 0.39777368107622834),
    (11.0, 10, 0.35751800242792553),
    (15.0, 10, 0.13206185628772061),
    (30, 10, 0.00085664121077530039),
    (15.5, 31, 0.99081191814794328),
    (29.45, 31, 0.54580925916100793),
    (31.5, 31, 0.44123309093382549),
    (34.1, 31, 0.32081982486966326),
    (46.5, 31, 0.036436185426086305),
    (93, 31, 4.1229902957326304e-8),
    (127.5, 255, 0.99999999999859596),
    (242.25, 255, 0.70699345148558625),
    (255.5, 255, 0.47940492427519212),
    (280.5, 255, 0.13074814071055558),
    (382.5, 255, 3.9407224213527262e-7),
    (765, 255, 2.1487233990474545e-52),
    (950.4749999999999, 1000.5, 0.86918526743188516),
    (1001.0, 1000.5, 0.48959709368976467),
    (1100.5500000000002, 1000.5, 0.014594510213117222),
    (1500.75, 1000.5, 1.020796263467108e-22),
    (3001.5, 1000.5, 1.3117267290445138e-198),
    (9500.0, 10000.0, 0.99983561383564118),
    (10000.5, 10000.0, 0.49670895371335187),
    (11000.0, 10000.0, 3.6183295580964793e-12),
    (15000.0, 10000.0, 5.9158688290519602e-208),
    (1000000.5, 1000000.0, 0.49967088946921577),
]

FISHER = [  # (x, freedom over, freedom under, tail)
    (0.01, 1, 5, 0.92423014115466037),
    (0.7, 1, 5, 0.44092462406977102),
    (1.0, 1, 5, 0.36321746764912263),
    (1.3, 1, 5, 0.30586773750976258),
    (4, 1, 5, 0.10193947882985836),
    (30, 1, 5, 0.0027649603013049565),
    (0.01, 2.5, 40, 0.9963097435499508),
    (0.7, 2.5, 40, 0.53289013375053669),
    (1.0, 2.5, 40, 0.39163213236925644),
    (1.3, 2.5, 40, 0.28682182975452324),
    (4, 2.5, 40, 0.018898556416944968),
    (30, 2.5, 40, 1.4283085668958662e-9),
    (0.01, 10, 60, 0.99999999659116104),
    (0.7, 10, 60, 0.72059202707715508),
    (1.0, 10, 60, 0.45392149636911818),
    (1.3, 10, 60, 0.25137718272987625),
    (4, 10, 60, 0.00032108599241103536),
    (30, 10, 60, 1.038253782369639e-19),
    (0.7, 100, 3, 0.76105867172985902),
    (1.0, 100, 3, 0.60381375038199335),
    (1.3, 100, 3, 0.48609953876237366),
    (4, 100, 3, 0.13883331744977694),
    (30, 100, 3, 0.0082163524638553813),
    (0.7, 300.5, 1000, 0.99988799642435145),
    (1.0, 300.5, 1000, 0.49334389848704118),
    (1.3, 300.5, 1000, 0.0018646426830392398),
    (4, 300.5, 1000, 1.1535757429520813e-60),
    (1.0, 10000.0, 10000.0, 0.5),
    (1.3, 10000.0, 10000.0, 1.6649080873049823e-39),
]

KOLMOGOROV = [  # (t, tail)
    (0.05, 1.0),
    (0.2, 0.99999999999949496),
    (0.3, 0.99999069419866543),
    (0.5, 0.96394524366487509),
    (0.8276, 0.49995841656354728),
    (0.99, 0.28087383922554892),
    (1.0, 0.26999967167735452),
    (1.18, 0.12345380942976571),
    (1.3581, 0.049999630431667413),
    (1.6276, 0.010001537333060772),
    (2.5, 7.4533063441573416e-6),
    (5, 3.8574996959278356e-22),
    (15, 7.3877661369745124e-196),
]

QUANTILES = [  # (p, z)
    (1e-300, -37.047096299361199),
    (1e-20, -9.2623400897984076),
    (1e-05, -4.2648907939228246),
    (0.01, -2.3263478740408411),
    (0.07, -1.4757910281791707),
    (0.075, -1.4395314709384559),
    (0.3, -0.52440051270804082),
    (0.5, 0.0),
    (0.8, 0.84162123357291436),
    (0.975, 1.9599639845400539),
    (0.99, 2.3263478740408408),
    (0.9999, 3.7190164854557084),
    (0.9999999999990905, 7.0477002566644087),
]

NORMAL = [  # (z, tail)
    (-8, 0.99999999999999938),
    (-1, 0.84134474606854295),
    (0, 0.5),
    (0.5, 0.3085375387259869),
    (1.96, 0.024997895148220436),
    (5, 2.8665157187919391e-7),
    (20, 2.7536241186062337e-89),
    (37, 5.7255712225245768e-300),
]


def test_chi_square_agrees_to_twelve_digits() -> None:
    """From freedom 1 to 10,000 and tails down to 1e-208; beyond it to ten."""
    x, freedom, tail = np.array(CHI_SQUARE).T
    found = special.chi_square_above(x, freedom)
    assert found[freedom <= 1e4] == pytest.approx(tail[freedom <= 1e4], rel=1e-12)
    assert found[freedom > 1e4] == pytest.approx(tail[freedom > 1e4], rel=1e-10)


def test_fisher_agrees_to_eleven_digits() -> None:
    """Tails down to 1e-60."""
    x, over, under, tail = np.array(FISHER).T
    assert special.fisher_above(x, over, under) == pytest.approx(tail, rel=1e-11)


def test_kolmogorov_agrees_to_thirteen_digits() -> None:
    """On both sides of where the series change."""
    t, tail = np.array(KOLMOGOROV).T
    assert special.kolmogorov_above(t) == pytest.approx(tail, rel=1e-13)


def test_normal_agrees_to_fourteen_digits() -> None:
    """The tail and its inverse."""
    z, tail = np.array(NORMAL).T
    assert special.normal_above(z) == pytest.approx(tail, rel=2e-14)
    for p, quantile in QUANTILES:
        assert special.normal_quantile(p) == pytest.approx(quantile, rel=1e-14, abs=1e-15)


def test_far_ends() -> None:
    """Nothing, everything, and what has no end."""
    for tail in (
        special.kolmogorov_above,
        lambda x: special.chi_square_above(x, 3),
        lambda x: special.fisher_above(x, 3, 4),
    ):
        assert tail([-1.0, 0.0, math.inf]).tolist() == [1, 1, 0]
        assert tail(np.empty((0, 2))).shape == (0, 2)
        assert tail(2.0).shape == ()


def test_what_is_no_number_is_refused() -> None:
    """NaN, shares outside (0, 1), freedoms outside their range."""
    with pytest.raises(ValueError, match="numbers"):
        special.kolmogorov_above([1.0, math.nan])
    for x, freedom in ((math.nan, 1), (1, 0), (1, -1), (1, 2e6), (1, math.nan)):
        with pytest.raises(ValueError, match="freedom"):
            special.chi_square_above(x, freedom)
        with pytest.raises(ValueError, match="freedom"):
            special.fisher_above(x, freedom, 2)
        with pytest.raises(ValueError, match="freedom"):
            special.fisher_above(x, 2, freedom)
    for p in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="quantile"):
            special.normal_quantile(p)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 500), st.floats(0.01, 500), st.floats(0.1, 300), st.floats(0.1, 300))
def test_tails_fall_and_mirror(x: float, y: float, over: float, under: float) -> None:
    """P(X > x) falls with x; 1 / F has the freedoms exchanged."""
    low, high = sorted((x, y))
    chi = special.chi_square_above([low, high], over)
    assert chi[1] <= chi[0] + 1e-13
    one = special.fisher_above(x, over, under)
    two = special.fisher_above(1 / x, under, over)
    assert float(one + two) == pytest.approx(1, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-12, 1 - 1e-9))
def test_quantile_inverts_the_tail(p: float) -> None:
    """P(Z > z(p)) = 1 - p."""
    assert float(special.normal_above(-special.normal_quantile(p))) == pytest.approx(p, rel=1e-12)
