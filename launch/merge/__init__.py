"""``steppe merge``: many fine-tunes of one base into one model, with a table of what it costs.

``settings``    what the command line says
``inputs``      run folders, exported folders and assets as folders that fit together
``material``    the tasks' data: scores of a split, unlabelled batches
``methods``     the methods on trees, and what they learnt
``geometry``    angles between task vectors, and where their signs disagree
``table``       scores by task, sweeps of the coefficient, texts for the terminal
``command``     the command itself
``evaluation``  ``steppe evaluate`` of a merged folder
"""
