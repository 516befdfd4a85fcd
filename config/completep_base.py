# The base shape, 2 layers x 256, on which to tune the hyperparameters that every other completep config inherits.
# Hardware: any CPU. Time, loss: TODO
out_dir = 'out/completep_base'
