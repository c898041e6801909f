"""Fit the Duffing equation to the Silverbox recording: the default parameters of `simulate_duffing`

The parameters minimise the simulation error over the first `--steps` training steps (`scipy.optimize.least_squares`),
starting from the linear frequency response. Each channel of the recording has a constant offset, which is fitted along.
Between the samples the input is band-limited (its 200 Hz lie well below half the sampling rate): interpolating it so leaves
a fraction of the error that holding or connecting the samples does.
"""
import argparse, time
import numpy as np
from scipy.optimize import least_squares
from scipy.signal import csd, resample_poly
from tbptt_fastai.datasets.benchmarks import SILVERBOX_FS as FS, duffing_response, load_silverbox

SUBSTEPS, EDGE = 8, 500 # integration steps per sample; steps left out at the start, until the unknown initial state is forgotten

def linear_start(u, y):
    "f0, zeta and gain from the frequency response, as 1/G = a + d*s + m*s^2 is linear in a, d and m"
    (f,Suy),(_,Suu) = csd(u, y, FS, nperseg=1024), csd(u, u, FS, nperseg=1024)
    keep = (f > 5) & (f < 190)
    s, G = 2j*np.pi*f[keep], (Suy/Suu)[keep]
    A = np.stack([np.ones_like(s), s, s**2], 1) * G[:,None] # times G: weights the resonance
    scale = np.abs(A).max(0)
    a,d,m = np.linalg.lstsq(np.r_[(A/scale).real, (A/scale).imag], np.r_[np.ones(len(s)), np.zeros(len(s))])[0] / scale
    w0 = np.sqrt(a/m)
    return w0/2/np.pi, d/(2*m*w0), 1/a

def simulate(p, u):
    "Output for the recorded input `u`, with p = f0, zeta, beta, gain, input offset, output offset"
    fine = resample_poly(u - p[4], 2*SUBSTEPS, 1, window=('kaiser', 8.), padtype='line')
    return duffing_response(np.r_[fine, fine[-1]], 1/(FS*SUBSTEPS), *p[:4])[:-1:SUBSTEPS] + p[5]

def rmse(p, u, y, skip): return 1e3*np.sqrt(np.mean((simulate(p, u) - y)[skip:]**2))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder of the nonlinear_benchmarks cache (default: as in load_silverbox)')
    parser.add_argument('--steps', type=int, default=10_000, help='length of the training segment')
    parser.add_argument('--start', type=int, default=0, help='first step of the training segment')
    args = parser.parse_args()
    train,valid,tests = load_silverbox(args.data, dtype=np.float64)
    u,y = (x[args.start:args.start+args.steps] for x in train)
    f0,zeta,gain = linear_start(u, y)
    print(f'linear start: f0={f0:.2f} Hz, zeta={zeta:.4f}, gain={gain:.4f} V/V')
    tic = time.time()
    x0 = np.array([f0, zeta, 0., gain, u.mean(), 0.])
    fit = least_squares(lambda p: 1e3*(simulate(p, u) - y)[EDGE:], x0, x_scale=[1, .01, 1, .1, .01, .01])
    for name,v in zip(['f0 [Hz]', 'zeta', 'beta [1/V^2]', 'gain [V/V]', 'input offset [V]', 'output offset [V]'], fit.x):
        print(f'{name:18} {v:.5f}')
    # the test follows the training and validation steps: the last of these bring the simulation to its initial state
    u,y = (np.r_[v[-EDGE:], t[:5000]] for v,t in zip(valid, tests['multisine']))
    print(f'RMSE: training {np.sqrt(np.mean(fit.fun**2)):.3f} mV, test multisine (first 5000 steps, washout 50) '
          f'{rmse(fit.x, u, y, EDGE+50):.3f} mV of {1e3*y[EDGE+50:].std():.1f} mV; fitted in {time.time()-tic:.0f} s')

if __name__ == '__main__': main()
