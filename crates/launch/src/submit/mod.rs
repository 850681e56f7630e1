//! Submission of a run to a cluster: what is chosen on the command line and in the configuration becomes what the cluster's own
//! tools take. Must not know: tch, the roles' work.

pub mod kubernetes;
pub mod slurm;
