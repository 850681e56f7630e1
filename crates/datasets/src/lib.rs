//! Data sets: importers, synthetic lesions, checks with splits and leaks, statistics, and the preparation of a run's data.
//!
//! Must not depend on: tch, tonic. Boxes are in pixels of the original image.
//!
//! # Examples
//! A synthetic record is a function of seed and index:
//! ```
//! use unveil_datasets::synth::{SynthSpec, record, sample};
//!
//! let spec = SynthSpec { no_finding: 0.0, several: 0.0, ..SynthSpec::new(10, 7) };
//! let drawn = sample(&spec, 0)?;
//! assert!(drawn.image != drawn.clean);
//!
//! let record = record(&spec, 0, &drawn);
//! assert_eq!(record.image, "images/synth-7-000000.png");
//! assert_eq!((record.boxes.len(), record.labels.len()), (1, 1));
//! assert!(record.faults(None).is_empty());
//! assert_eq!(sample(&spec, 0)?.boxes, drawn.boxes);
//! # Ok::<(), unveil_datasets::synth::SynthError>(())
//! ```

pub mod check;
pub mod import;
mod near_duplicates;
pub mod prepare;
pub mod stats;
pub mod synth;
