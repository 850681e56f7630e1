//! Record files and images: reading records with safe image paths, decoding PNG, JPEG and DICOM, storing images by content, and linking
//! images into the folder of a new record file.
//!
//! Must not depend on: tch, tonic. Boxes are in pixels of the original image.
//!
//! # Examples
//! A record file, and the error of a record that may not be read:
//! ```
//! use unveil_data::records::RecordFile;
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("records.jsonl");
//! let lines = [
//!     r#"{"id":"ct-7","image":"ct-7.png","category":"nodule","boxes":[[10,20,50,60]],"split":"train"}"#,
//!     r#"{"id":"ct-8","image":"ct-8.png","boxes":[],"split":"test"}"#,
//! ];
//! std::fs::write(&path, lines.join("\n"))?;
//! let test = RecordFile::load(&path)?.split("test");
//! assert_eq!(test.records[0].id, "ct-8");
//! assert!(test.location(0).ends_with("records.jsonl:2"));
//!
//! // Errors name the file and the line.
//! std::fs::write(&path, r#"{"id":"ct-9","image":"../ct-9.png"}"#)?;
//! let error = RecordFile::load(&path).unwrap_err().to_string();
//! assert!(error.contains("records.jsonl:1: record \"ct-9\"") && error.contains("leaves the folder"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod decode;
pub mod files;
pub mod finding;
pub mod image_folder;
mod image_path;
pub mod image_root;
pub mod image_store;
pub mod records;
mod rgb_image;
