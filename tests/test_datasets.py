import os, shutil, sys
from pathlib import Path
import numpy as np, pytest
from scipy.integrate import solve_ivp
from scipy.io import savemat
from scipy.signal import csd, resample_poly, welch
from tbptt_fastai.datasets.benchmarks import SILVERBOX_FS, duffing_response, load_silverbox, simulate_duffing

FIT = dict(f0=68.32, zeta=0.0488, beta=3.95, gain=1.0095) # the defaults
FILES = Path('Silverbox')/'SilverboxFiles'

@pytest.fixture(scope='module')
def recording():
    root = os.environ.get('TBPTT_DATA')
    if not root or not (Path(root)/'nlb_cache'/FILES).is_dir(): pytest.skip('TBPTT_DATA does not point to the Silverbox recording')
    pytest.importorskip('nonlinear_benchmarks')
    return load_silverbox(dtype=np.float64)

# --- simulate_duffing

def _reference(n, fs, seed, amplitude, f0, zeta, beta, gain):
    "Input and output from the sum of cosines and an adaptive solver with a tight tolerance"
    k = np.arange(1, 2*n*200/fs, 2)
    w, phase = np.pi*k*fs/n, 2*np.pi*np.random.default_rng(seed).random(len(k))
    u = lambda t: amplitude*np.sqrt(2/len(k))*np.cos(w*t + phase).sum()
    w0, t = 2*np.pi*f0, np.arange(n)/fs
    f = lambda t,x: [x[1], w0**2*(gain*u(t) - x[0] - beta*x[0]**3) - 2*zeta*w0*x[1]]
    return np.array([u(s) for s in t]), solve_ivp(f, (0, t[-1]), [0, 0], 'DOP853', t, rtol=1e-9, atol=1e-12).y[0]

@pytest.mark.parametrize('kw,tol', [({}, 1e-5), (dict(fs=1000.), 1e-5), (dict(amplitude=.1), 1e-4)])
def test_the_simulation_is_as_accurate_as_it_says(kw, tol):
    u,y = simulate_duffing(1000, seed=3, **kw)
    u_ref,y_ref = _reference(1000, **{**dict(fs=SILVERBOX_FS, seed=3, amplitude=.0222), **kw}, **FIT)
    np.testing.assert_allclose(u, u_ref, rtol=0, atol=1e-12)
    assert np.abs(y - y_ref).max() < tol*y_ref.std()

def test_the_input_has_the_length_rms_and_band_that_were_asked_for():
    u,y = simulate_duffing(4096, amplitude=.03)
    assert u.shape == y.shape == (4096,) and u.dtype == y.dtype == np.float64
    assert np.sqrt(np.mean(u**2)) == pytest.approx(.03, rel=1e-9)
    power = np.abs(np.fft.rfft(np.r_[u, -u]))**2 # a full period of the odd multisine
    f = np.fft.rfftfreq(8192, 1/SILVERBOX_FS)
    assert power[f > 200].sum() < 1e-20*power.sum() and power[::2].sum() < 1e-20*power.sum()
    assert np.ptp(power[1::2][f[1::2] <= 200]) < 1e-9*power.max()

def test_the_simulation_depends_on_the_seed_alone():
    a,b,c = (simulate_duffing(500, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(np.corrcoef(a[0], c[0])[0,1]) < .3

def test_noise_is_on_the_output_only():
    u,y = simulate_duffing(5000, seed=2)
    u2,y2 = simulate_duffing(5000, seed=2, noise=1e-3)
    np.testing.assert_array_equal(u, u2)
    assert (y2 - y).std() == pytest.approx(1e-3, rel=.05)

def test_the_linear_part_has_the_resonance_of_its_parameters():
    u,y = simulate_duffing(20_000, amplitude=1e-4)
    (f,Suy),(_,Suu) = (csd(u, x, SILVERBOX_FS, nperseg=2048) for x in (y, u))
    G = np.abs(Suy/Suu)[f < 190]
    assert f[G.argmax()] == pytest.approx(68.32*np.sqrt(1-2*.0488**2), abs=.5)
    assert G.max() == pytest.approx(1.0095/(2*.0488), rel=.05)
    assert G[(f[:len(G)] > 2) & (f[:len(G)] < 5)].mean() == pytest.approx(1.0095, rel=.02)

def test_cubic_stiffness_raises_the_resonance():
    peak = lambda amplitude: (lambda f,P: f[P.argmax()])(*welch(simulate_duffing(20_000, amplitude=amplitude)[1], SILVERBOX_FS, nperseg=2048))
    assert peak(.08) > peak(1e-4) + 3

@pytest.mark.parametrize('kw', [dict(n_steps=0), dict(n_steps=-3), dict(n_steps=1), dict(n_steps=10.), dict(amplitude=-1.), dict(amplitude=np.nan),
    dict(noise=-.1), dict(fs=0), dict(fs=np.inf), dict(f0=0), dict(zeta=-.1), dict(bandwidth=0), dict(bandwidth=400.)])
def test_bad_arguments_are_refused_by_name_and_value(kw):
    (name,value), = kw.items()
    with pytest.raises(ValueError, match=f'^{name}={value!r}: expected'): simulate_duffing(**{**dict(n_steps=100), **kw})

@pytest.mark.parametrize('kw', [dict(amplitude=.5), dict(amplitude=1e6), dict(amplitude=.05, beta=-50.)]) # inaccurate, diverging, softening
def test_too_large_an_amplitude_is_refused(kw):
    with pytest.raises(ValueError, match=f'^amplitude={kw["amplitude"]!r}: the output reaches'): simulate_duffing(1000, **kw)

def test_simulated_statistics_are_near_the_recorded_ones(recording):
    (u,y),(us,ys) = recording[0], simulate_duffing(50_000)
    assert us.std() == pytest.approx(u.std(), rel=.01) and ys.std() == pytest.approx(y.std(), rel=.1)
    assert np.abs(ys).max() == pytest.approx(np.abs(y).max(), rel=.25)

def test_default_parameters_fit_the_recording(recording):
    # 500 steps before the test bring the simulation to its initial state; 8.3 and 2.9 mV are the recording's offsets
    u,y = (np.r_[v[-500:], t[:5000]] for v,t in zip(recording[1], recording[2]['multisine']))
    fine = resample_poly(u - .0083, 16, 1, window=('kaiser', 8.), padtype='line')
    sim = duffing_response(np.r_[fine, fine[-1]], 1/(8*SILVERBOX_FS), **FIT)[:-1:8] + .0029
    assert 1e3*np.sqrt(np.mean((sim - y)[550:]**2)) < .31 # mV

# --- load_silverbox

@pytest.fixture
def nb(): return pytest.importorskip('nonlinear_benchmarks')

def _fill(root, n=131_072, bad=None, mat=True):
    "A cache folder with a recording of `n` steps; `bad` replaces one value of the output"
    (root/FILES).mkdir(parents=True)
    (root/'Silverbox'/'SilverboxFiles.zip').touch()
    u = np.arange(n)/n
    y = -u.copy()
    if bad is not None: y[60_000] = bad
    if mat: savemat(root/FILES/'SNLS80mV.mat', dict(V1=u[None], V2=y[None]))
    return u, root/FILES/'SNLS80mV.mat'

@pytest.mark.parametrize('how', ['path', 'str', 'env'])
def test_the_splits_are_those_of_the_benchmark(nb, tmp_path, monkeypatch, how):
    u,_ = _fill(tmp_path/'nlb_cache')
    monkeypatch.setenv('TBPTT_DATA', str(tmp_path if how == 'env' else tmp_path/'elsewhere'))
    train,valid,tests = load_silverbox({'path': tmp_path/'nlb_cache', 'str': str(tmp_path/'nlb_cache'), 'env': None}[how], dtype=np.float64)
    for (a,b),i,n in [(train, 40_650, 50_000), (valid, 90_650, 15_062), (tests['multisine'], 105_712, 21_688), (tests['arrow'], 100, 40_475),
                      (tests['arrow_no_extrapolation'], 100, 32_000)]:
        np.testing.assert_array_equal(a, u[i:i+n])
        np.testing.assert_array_equal(b, -a)
    assert list(tests) == ['multisine', 'arrow', 'arrow_no_extrapolation']

def test_the_recording_is_float32_and_other_types_than_floats_are_refused(nb, tmp_path):
    _fill(tmp_path)
    assert {x.dtype for x in load_silverbox(tmp_path)[0]} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="^dtype=<class 'int'>: expected"): load_silverbox(tmp_path, dtype=int)

def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'nonlinear_benchmarks', None)
    with pytest.raises(ImportError, match=r"pip install 'tbptt_fastai\[benchmarks\]'"): load_silverbox()

def _download(monkeypatch, nb, content, error=None):
    def fake(url, destination):
        Path(destination).write_bytes(content)
        if error: raise error
    monkeypatch.setattr(nb.utilities, 'download_file_from_google_drive', fake)

@pytest.mark.parametrize('content,error', [(b'half', OSError('connection broken')), (b'<html>quota exceeded</html>', None)])
def test_failed_download_leaves_nothing(nb, tmp_path, monkeypatch, capsys, content, error):
    _download(monkeypatch, nb, content, error)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    root = tmp_path/'new'/'cache'
    with pytest.raises(ConnectionError) as e: load_silverbox(root)
    for s in [str(root), 'by hand', 'path=', 'create_dls_duffing', 'connection broken' if error else 'BadZipFile']: assert s in str(e.value)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''

def test_failed_download_keeps_what_was_there(nb, tmp_path, monkeypatch):
    _download(monkeypatch, nb, b'half', OSError('connection broken'))
    (tmp_path/'Silverbox').mkdir()
    (tmp_path/'Silverbox'/'mine.txt').write_text('mine')
    with pytest.raises(ConnectionError): load_silverbox(tmp_path)
    assert [p.name for p in tmp_path.rglob('*')] == ['Silverbox', 'mine.txt']

def test_the_recording_is_downloaded_once(nb, tmp_path, monkeypatch):
    _fill(tmp_path/'source')
    archive = shutil.make_archive(str(tmp_path/'archive'), 'zip', tmp_path/'source'/'Silverbox', 'SilverboxFiles')
    _download(monkeypatch, nb, Path(archive).read_bytes())
    first = load_silverbox(tmp_path/'new'/'cache')
    _download(monkeypatch, nb, b'', AssertionError('downloaded again'))
    np.testing.assert_array_equal(first[1], load_silverbox(tmp_path/'new'/'cache')[1])
    assert {p.name for p in (tmp_path/'new'/'cache'/'Silverbox').rglob('*.*')} == {'SilverboxFiles.zip', 'SNLS80mV.mat'}

def test_a_path_that_is_a_file_is_refused(nb, tmp_path):
    (tmp_path/'x').touch()
    with pytest.raises(NotADirectoryError, match='expected a folder, found a file'): load_silverbox(tmp_path/'x')

@pytest.mark.parametrize('kind,text', [('garbage', 'cannot be read'), ('cut', 'cannot be read'), ('empty', 'cannot be read'), ('missing', 'file not found'),
    ('short', r'train_val has shape \(63262,\), expected \(65062,\)'), ('nan', 'train_val has values that are not finite')])
def test_a_corrupt_file_is_named_with_what_to_delete(nb, tmp_path, kind, text):
    _,mat = _fill(tmp_path, n=125_000 if kind == 'short' else 131_072, bad=np.nan if kind == 'nan' else None, mat=kind != 'missing')
    if kind == 'garbage': mat.write_bytes(b'not a mat file'*100)
    if kind == 'cut': mat.write_bytes(mat.read_bytes()[:100_000])
    if kind == 'empty': mat.write_bytes(b'')
    with pytest.raises(OSError, match=f'SNLS80mV.mat: {text}') as e: load_silverbox(tmp_path)
    assert str(mat) in str(e.value) and f'delete the folder {tmp_path/"Silverbox"}' in str(e.value)

def test_recorded_values_have_the_published_scale(recording):
    train,valid,tests = recording
    assert [1e3*x[0].std() for x in (train, valid, tests['multisine'])] == pytest.approx([22.2]*3, abs=.2)
    assert 1e3*train[1].std() == pytest.approx(54.5, abs=.5)
