"""``steppe tour``: from a pretrained encoder and several tasks to one small model that serves all.

``settings``  what the command line says, and the longer version of it
``graph``     stages with hashes: what is done already, what a changed setting runs again
``stages``    the stages of a configuration, and what each depends on
``world``     the tasks' data, and the scores of a model that serves them
``flat``      fine-tuning, how flat what it found is, and a picture of that
``shared``    merging
``small``     distillation into fewer layers
``rounded``   integers
``shipped``   what is handed out, opened again; sizes, FLOPs and latency
``claims``    what each stage promises, and whether it is so
``table``     the stages in one table
``command``   the command itself
"""
