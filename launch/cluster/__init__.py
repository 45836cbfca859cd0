"""Job files for a cluster, rendered from one set of options; and what larger clusters would do.

    python -m jaxfm.launch.cluster render --kind=slurm --nodes=4 --gpus=8 \\
        -- federate --data=digits --rounds=100 > job.sbatch
    python -m jaxfm.launch.cluster render --kind=jobset --nodes=4 --gpus=8 \\
        --jobset.image=IMAGE --jobset.claim=CLAIM -- pretrain > job.yaml
    python -m jaxfm.launch.cluster render --kind=tpu --tpu.type=v5litepod-16 --tpu.zone=ZONE \\
        -- federate > job.sh
    python -m jaxfm.launch.cluster project --machines=h100,v5p     # project --help says more

What stands after -- is the script of jaxfm.launch and its flags, which are checked now rather than
when the job starts. Nothing is submitted: the file goes to standard output, and its first lines say
how to. A job that is stopped early saves first, and the same command goes on.
"""
