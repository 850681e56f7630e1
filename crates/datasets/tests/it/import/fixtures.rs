//! A small data set per format, with the layout and field names of the sources cited by each importer's module.

use image::{ImageBuffer, Luma};

use super::{DatasetFixture, Format};

/// Creates a data set of a format.
pub(super) fn dataset(format: Format) -> DatasetFixture {
    let set = DatasetFixture::new();
    match format {
        Format::Voc => voc(&set),
        Format::Coco => coco(&set),
        Format::Yolo => yolo(&set),
        Format::Via => via(&set),
        Format::DeepLesion => deeplesion(&set),
        Format::NihChestXray => nih(&set),
        Format::Tbx11k => tbx11k(&set),
        Format::KvasirSeg => kvasir(&set),
        Format::KidneyStone => kidney_stone(&set),
        Format::MedGrit => med_grit(&set),
        Format::Slake => slake(&set),
        Format::VqaRad => vqa_rad(&set),
        Format::PmcVqa => pmc_vqa(&set),
        Format::OmniMedVqa => omnimedvqa(&set),
        Format::MedVh => medvh(&set),
        Format::MsSwift => ms_swift(&set),
        Format::Llava => llava(&set),
    }
    set
}

fn voc(set: &DatasetFixture) {
    let object =
        "<object><name>cyst</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>";
    set.image("JPEGImages/a.jpg", (20, 10), 1)
        .write("Annotations/a.xml", format!("<annotation><filename>a.jpg</filename>{object}</annotation>"))
        .write("ImageSets/Main/train.txt", "a\n");
}

fn coco(set: &DatasetFixture) {
    set.image("train2017/a.jpg", (40, 20), 1).image("train2017/b.jpg", (80, 40), 2).image("val2017/c.jpg", (40, 20), 3);
    set.image("train2017/d.jpg", (40, 20), 4);
    set.write(
        "annotations/instances_train2017.json",
        r#"{"images": [
              {"id": 7, "file_name": "a.jpg", "width": 40, "height": 20},
              {"id": 8, "file_name": "b.jpg", "width": 40, "height": 20},
              {"id": 9, "file_name": "gone.jpg", "width": 40, "height": 20},
              {"id": 10, "file_name": "../../../../etc/passwd", "width": 40, "height": 20},
              {"id": 11, "file_name": "d.jpg", "width": 40, "height": 20}],
            "annotations": [
              {"id": 1, "image_id": 7, "category_id": 1, "bbox": [4.0, 2.0, 10.0, 5.0], "area": 50.0, "iscrowd": 0},
              {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 30, 20], "iscrowd": 1},
              {"id": 3, "image_id": 7, "category_id": 1, "bbox": [5, 5, 0, 4], "iscrowd": 0},
              {"id": 4, "image_id": 11, "category_id": 5, "bbox": [5, 5, 2, 4], "iscrowd": 0},
              {"id": 5, "image_id": 99, "category_id": 1, "bbox": [5, 5, 2, 4], "iscrowd": 0},
              {"id": 6, "image_id": 11, "category_id": 2, "keypoints": []},
              {"id": 7, "image_id": 8, "category_id": 2, "bbox": [10, 10, 10, 11], "iscrowd": 0}],
            "categories": [{"id": 1, "name": "nodule"}, {"id": 2, "name": "cyst"}]}"#,
    );
    set.write(
        "annotations/instances_val2017.json",
        r#"{"images": [{"id": 1, "file_name": "c.jpg", "width": 40, "height": 20}], "annotations": [],
            "categories": [{"id": 1, "name": "nodule"}]}"#,
    );
    set.write("annotations/captions_val2017.json", r#"{"images": [], "annotations": []}"#);
}

fn yolo(set: &DatasetFixture) {
    set.write(
        "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['nodule', 'cyst']\n",
    );
    set.image("train/images/a.jpg", (100, 50), 1).image("train/images/b.jpg", (100, 50), 2);
    set.image("train/images/d.jpg", (100, 50), 4).image("valid/images/c.jpg", (100, 50), 3);
    set.write("train/labels/a.txt", "1 0.5 0.5 0.2 0.4\n0 0.05 0.5 0.2 0.4\n0 0.1 0.1 0.9 0.1 0.9 0.9\n");
    set.write("train/labels/d.txt", "1 0.5 0.5 0.2 0.4\n7 0.5 0.5 0.1 0.1\nx 0.5 0.5 0.1 0.1\n0 0.5 0.5\n");
    set.write("valid/labels/c.txt", "0 0.25 0.5 0.1 0.2 0.93\n\n");
}

fn via(set: &DatasetFixture) {
    set.image("images/a.png", (100, 100), 1).image("images/b.png", (100, 100), 2).image("c.png", (100, 100), 3);
    set.image("images/d.png", (100, 100), 4);
    set.write(
        "via.json",
        r#"{"_via_settings": {}, "_via_img_metadata": {
            "a.png123": {"filename": "a.png", "size": 123, "regions": [
              {"shape_attributes": {"name": "rect", "x": 10, "y": 20, "width": 30, "height": 40}, "region_attributes": {"label": "mass"}},
              {"shape_attributes": {"name": "polygon", "all_points_x": [5, 25, 15], "all_points_y": [7, 8, 30]}, "region_attributes": {"label": "mass"}},
              {"shape_attributes": {"name": "circle", "cx": 50, "cy": 50, "r": 10}, "region_attributes": {"kind": {"cyst": true, "mass": false}}},
              {"shape_attributes": {"name": "ellipse", "cx": 50, "cy": 50, "rx": 20, "ry": 10, "theta": 1.5707963}, "region_attributes": {"class": "cyst"}}],
              "file_attributes": {}},
            "d.png7": {"filename": "d.png", "size": 7, "regions": [
              {"shape_attributes": {"name": "rect", "x": 10, "y": 20, "width": 30, "height": 40}, "region_attributes": {"label": "mass"}},
              {"shape_attributes": {"name": "point", "cx": 5, "cy": 5}, "region_attributes": {"label": "mass"}},
              {"shape_attributes": {"name": "rect", "x": 10}, "region_attributes": {"label": "mass"}},
              {"shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 3, "height": 4}, "region_attributes": {}}],
              "file_attributes": {}},
            "b.png9": {"filename": "b.png", "size": 9, "regions": {"0":
              {"shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}, "region_attributes": {"name": "mass"}}}}}}"#,
    );
    set.write(
        "via.csv",
        "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n\
         c.png,9,\"{}\",1,0,\"{\"\"name\"\":\"\"rect\"\",\"\"x\"\":2,\"\"y\"\":3,\"\"width\"\":4,\"\"height\"\":5}\",\"{\"\"type\"\":\"\"cyst\"\"}\"\n",
    );
}

fn deeplesion(set: &DatasetFixture) {
    let header = "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,\
                  Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,\
                  Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test\n";
    let row = |name: &str, patient: u32, boxes: &str, kind: i32, noisy: u32, split: u32| {
        format!(
            "{name},{patient},1,1,109,\"1, 2, 3, 4, 5, 6, 7, 8\",\"{boxes}\",\"2, 1\",\"0.1, 0.2, 0.3\",{kind},{noisy},\"103, 115\",\
             \"0.488, 0.488, 5\",\"64, 64\",\"-175, 275\",F,62,{split}\n"
        )
    };
    let rows = [
        row("000001_01_01_109.png", 1, "10.5, 11.0, 20.25, 21.5", 3, 0, 3),
        row("000001_01_01_109.png", 1, "-4.0, 30, 12, 44", 5, 0, 3),
        row("000001_01_01_109.png", 1, "400, 410, 430, 450", 5, 0, 3),
        row("000002_01_01_014.png", 2, "1, 2, 9, 9", -1, 0, 1),
        row("000002_01_01_014.png", 2, "1, 2, 9, 9", -1, 1, 1),
        row("000003_01_01_001.png", 3, "1, 2, 9, 9", 1, 0, 2),
        row("000004_01_01_001.png", 4, "1, 2, x, 9", 1, 0, 2),
    ];
    set.write("DL_info.csv", format!("{header}{}", rows.concat()));
    for (name, tone) in [("000001_01_01/109.png", 50), ("000002_01_01/014.png", 100)] {
        // Hounsfield units from left to right: -175, 50, 275, above.
        let deep = ImageBuffer::from_fn(64, 64, |x, y| {
            Luma([32_768_u16 - 175 + 225 * ((x / 16) as u16) + tone * u16::from(y == 0)])
        });
        let mut png = std::io::Cursor::new(Vec::new());
        image::DynamicImage::ImageLuma16(deep).write_to(&mut png, image::ImageFormat::Png).unwrap();
        set.write(&format!("Images_png/{name}"), png.into_inner());
    }
}

fn nih(set: &DatasetFixture) {
    set.write(
        "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n\
         00000013_005.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,\n\
         00000013_005.png,Infiltrate,10,20,30,40,,,\n\
         00000013_006.png,Mass,1,2,x,4,,,\n\
         00000099_000.png,Mass,1,2,3,4,,,\n",
    );
    set.write(
        "Data_Entry_2017.csv",
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],\
         OriginalImagePixelSpacing[x,y],\n\
         00000013_005.png,Atelectasis|Infiltration,5,13,60,M,AP,3056,2544,0.139,0.139,\n\
         00000013_007.png,No Finding,7,13,60,M,AP,3056,2544,0.139,0.139,\n\
         00000014_000.png,Effusion,0,14,60,M,AP,3056,2544,0.139,0.139,\n",
    );
    set.image("images_001/images/00000013_005.png", (1024, 1024), 1).image(
        "images_002/images/00000013_007.png",
        (512, 512),
        2,
    );
    set.image("images_002/images/00000014_000.png", (512, 512), 3);
}

fn tbx11k(set: &DatasetFixture) {
    for (k, name) in
        ["tb/tb0005.png", "tb/tb1199.png", "tb/tb0007.png", "health/h0001.png", "sick/s0001.png"].iter().enumerate()
    {
        set.image(&format!("imgs/{name}"), (64, 64), k as u8);
    }
    let categories = r#""categories": [{"id": 1, "name": "ActiveTuberculosis", "supercategory": "Tuberculosis"},
        {"id": 2, "name": "ObsoletePulmonaryTuberculosis", "supercategory": "Tuberculosis"},
        {"id": 3, "name": "PulmonaryTuberculosis", "supercategory": "Tuberculosis"}]"#;
    let image = |id: u32, name: &str| format!(r#"{{"id": {id}, "file_name": "{name}", "width": 64, "height": 64}}"#);
    let train = ["tb/tb0005.png", "tb/tb1199.png", "health/h0001.png", "sick/s0001.png", "extra/da/x.png"];
    let images: Vec<String> = train.iter().enumerate().map(|(k, n)| image(k as u32, n)).collect();
    set.write(
        "annotations/json/TBX11K_train.json",
        format!(
            r#"{{"images": [{}], {categories}, "annotations": [
                {{"id": 1, "image_id": 0, "category_id": 1, "bbox": [5, 6, 20, 30], "iscrowd": 0}},
                {{"id": 2, "image_id": 0, "category_id": 2, "bbox": [40, 6, 10, 10], "iscrowd": 0}}]}}"#,
            images.join(", ")
        ),
    );
    set.write(
        "annotations/json/TBX11K_val.json",
        format!(
            r#"{{"images": [{}], {categories}, "annotations": [
                {{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}}]}}"#,
            image(1, "tb/tb0007.png")
        ),
    );
    set.write("lists/TBX11K_train.txt", "tb/tb0005.png\ntb/tb1199.png\nhealth/h0001.png\nsick/s0001.png\n");
    set.write("lists/TBX11K_val.txt", "imgs/tb/tb0007.png\n");
}

fn kvasir(set: &DatasetFixture) {
    set.write(
        "kavsir_bboxes.json",
        r#"{"cju0qkwl35piu0993l0dewei2": {"height": 52, "width": 62, "bbox": [{"label": "polyp", "xmin": 3, "ymin": 5, "xmax": 43, "ymax": 33},
              {"label": "polyp", "xmin": 50, "ymin": 40, "xmax": 62, "ymax": 52}]},
            "cju0roawvklrq0799vmjorwfv": {"height": 26, "width": 31, "bbox": [{"label": "polyp", "xmin": "4", "ymin": 5, "xmax": 14, "ymax": 15}]},
            "gone": {"height": 10, "width": 10, "bbox": [{"label": "polyp", "xmin": 1, "ymin": 1, "xmax": 4, "ymax": 5}]},
            "cju0odd": {"height": 10, "width": 10, "bbox": [{"label": "polyp", "xmin": 1, "ymin": 1, "xmax": 4}]}}"#,
    );
    set.image("images/cju0qkwl35piu0993l0dewei2.jpg", (62, 52), 1).image(
        "images/cju0roawvklrq0799vmjorwfv.jpg",
        (62, 52),
        2,
    );
    set.image("images/cju0odd.jpg", (10, 10), 3);
    set.write("train.txt", "cju0qkwl35piu0993l0dewei2\n").write("val.txt", "cju0roawvklrq0799vmjorwfv\n");
}

fn kidney_stone(set: &DatasetFixture) {
    set.write("data.yaml", "train: ../train/images\nval: ../valid/images\n\nnc: 1\nnames: ['Tas_Var']\n");
    let names =
        ["train/images/p1_12_jpg.rf.0a1.jpg", "valid/images/p1_12_jpg.rf.9ff.jpg", "valid/images/p2_3_jpg.rf.7e7.jpg"];
    for (k, name) in names.iter().enumerate() {
        set.image(name, (64, 64), k as u8)
            .write(&name.replace("images", "labels").replace(".jpg", ".txt"), "0 0.5 0.5 0.25 0.125\n");
    }
    set.write("train/labels/p1_12_jpg.rf.0a1.txt", "0 0.5 0.5 0.25 0.125\n");
    set.write("valid/labels/p1_12_jpg.rf.9ff.txt", "0 0.5 0.5 0.25 0.125\n")
        .write("valid/labels/p2_3_jpg.rf.7e7.txt", "");
}

fn med_grit(set: &DatasetFixture) {
    let name = "ct_00--AMOS2022--amos_0001--x_0010";
    set.image(&format!("images/{name}.png"), (200, 100), 1);
    set.write(
        "train.json",
        format!(
            r#"[{{"id": "{name}", "conversations": [
                ["Picture 1: <img>/root/x.png</img>\nWhere is the <ref>left kidney</ref>?", "<ref>left kidney</ref><box>(0.25, 0.5), (0.5, 0.75)</box>"],
                ["Picture 1: <img>x</img>\nPoint out the liver and the spleen.", "The <ref>liver</ref><box>(100,200),(300,400)</box> and the <ref>spleen</ref><box>(500,200),(600,400)</box>."],
                ["Where is the <ref>aorta</ref>?", "<box>(0.1,0.1),(0.2,0.2)</box>"],
                ["What is in <box>(100,200),(300,400)</box>?", "The liver."],
                ["Where is the stomach?", "<ref>stomach</ref><box>(1,2),(3000,4)</box>"],
                ["Only a question"]]}},
              {{"id": "mr_00--gone--1--x_0001", "conversations": [["Q", "A"]]}}]"#
        ),
    );
}

fn slake(set: &DatasetFixture) {
    set.image("imgs/xmlab0/source.jpg", (100, 80), 1).image("imgs/xmlab1/source.jpg", (100, 80), 2);
    set.image("imgs/xmlab2/source.jpg", (100, 80), 4);
    let question = |qid: u32, img: u32, q: &str, a: &str, lang: &str| {
        format!(
            r#"{{"img_id": {img}, "img_name": "xmlab{img}/source.jpg", "question": "{q}", "answer": "{a}", "q_lang": "{lang}", "location": "Abdomen",
                "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa", "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": {qid}}}"#
        )
    };
    let train = [
        question(9, 0, "What modality is used?", "MRI", "en"),
        question(10, 0, "图中有什么？", "肝", "zh"),
        question(11, 0, "Empty?", "", "en"),
        question(12, 7, "Gone?", "Yes", "en"),
        question(15, 2, "Which organ is seen?", "Spleen", "en"),
    ];
    set.write("train.json", format!("[{}]", train.join(",")));
    let validate =
        [question(13, 1, "Is it normal?", "No", "en"), question(14, 169, "Is there atelectasis?", "Yes", "en")];
    set.write("validate.json", format!("[{}]", validate.join(",")));
    set.write("test.json", "[]");
    set.write("imgs/xmlab0/detection.json", r#"[{"Liver": [10.0, 20.0, 30.0, 40.0]}, {"Cyst": [90, 70, 12, 12]}]"#);
    set.write("imgs/xmlab2/detection.json", r#"[{"Liver": [10.0, 20.0, 30.0, 40.0]}, {"Spleen": [1, 2, "x", 4]}]"#);
    set.write("imgs/xmlab1/detection.json", "[]");
    // As published; the image is large enough for its boxes.
    set.image("imgs/xmlab169/source.jpg", (640, 800), 3);
    set.write("imgs/xmlab169/detection.json", r#"[{"Atelectasis": [212.0, 587.0, 247.0, 201.0]}]"#);
}

fn vqa_rad(set: &DatasetFixture) {
    set.image("VQA_RAD Image Folder/synpic1.jpg", (30, 30), 1).image("VQA_RAD Image Folder/synpic2.jpg", (30, 30), 2);
    set.write(
        "VQA_RAD Dataset Public.json",
        r#"[{"qid": "0", "phrase_type": "freeform", "qid_linked_id": "03f451ca", "image_case_url": "https://medpix.nlm.nih.gov/case",
             "image_name": "synpic1.jpg", "image_organ": "HEAD", "evaluation": "not evaluated", "question": "Are regions of the brain infarcted?",
             "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED "},
            {"qid": 1, "phrase_type": "test_freeform", "image_name": "synpic1.jpg", "image_organ": "HEAD", "question": "How many? ",
             "question_type": "COUNT", "answer": 4, "answer_type": "OPEN"},
            {"qid": "2", "phrase_type": "para", "image_name": "synpic2.jpg", "image_organ": "CHEST", "question": "Which side?\t",
             "question_type": "POS", "answer": "left\t", "answer_type": "OPEN"},
            {"qid": "3", "phrase_type": "para", "image_name": "synpic9.jpg", "question": "Gone?", "answer": "yes"},
            {"qid": "4", "phrase_type": "para", "image_name": "synpic2.jpg", "question": "No answer?", "answer": null}]"#,
    );
}

fn pmc_vqa(set: &DatasetFixture) {
    set.image("images/PMC1_fig1.jpg", (30, 20), 1).image("images/PMC2_fig1.jpg", (30, 20), 2);
    let header = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n";
    set.write(
        "train.csv",
        format!(
            "{header}PMC1_fig1.jpg, What is shown? ,Cyst, A:Mass , B:Cyst ,\" C:Stone, small \", D:None ,B\n\
             PMC1_fig1.jpg,Which?,Elsewhere, A:Mass , B:Cyst , C:Stone , D:None ,\n\
             gone.jpg,Which?,Mass, A:Mass , B:Cyst , C:Stone , D:None ,A\n"
        ),
    );
    set.write("test.csv", format!("{header}PMC2_fig1.jpg,Unclean?,Mass, A:Mass , B:Cyst , C:Stone , D:None ,A\n"));
    set.write("test_clean.csv", format!("{header}PMC2_fig1.jpg,Clean?,Stone, A:Mass , B:Cyst , C:Stone , D:None ,C\n"));
    set.write(
        "test_2.csv",
        "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n\
         7,PMC2_fig1.jpg,\"A caption, long\",Second?,A: One,B: Two,C: Three,D: Four,D,test\n",
    );
}

fn omnimedvqa(set: &DatasetFixture) {
    set.image("Images/ACRIMA/Im553_g_ACRIMA.png", (30, 30), 1).image("Images/Chest CT Scan/test/a b.png", (30, 30), 2);
    set.write(
        "QA_information/Open-access/ACRIMA.json",
        r#"[{"dataset": "ACRIMA", "question_id": "ACRIMA_0000", "question_type": "Modality Recognition", "question": "Which imaging was used?",
             "gt_answer": "Fundus photography", "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png", "option_A": "Fundus photography.", "option_B": "CT",
             "option_C": "MRI", "option_D": "PET", "modality_type": "Fundus Photography"},
            {"dataset": "ACRIMA", "question_id": "ACRIMA_0001", "question_type": "Disease Diagnosis", "question": "Is there glaucoma?",
             "gt_answer": "Maybe", "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png", "option_A": "Yes", "option_B": "No", "modality_type": "Fundus Photography"}]"#,
    );
    set.write(
        "QA_information/Open-access/Chest CT Scan.json",
        r#"[{"dataset": "Chest CT Scan", "question_id": "Chest CT Scan_0000", "question_type": "Disease Diagnosis", "question": "Is it normal?",
             "gt_answer": "No", "image_path": "Images/Chest CT Scan/test/a b.png", "option_A": "Yes", "option_B": "No", "modality": "CT"}]"#,
    );
    set.write(
        "QA_information/Restricted-access/AIDA.json",
        r#"[{"dataset": "AIDA", "question_id": "AIDA_0", "question": "?", "gt_answer": "Yes", "image_path": "Images/AIDA/x.png", "option_A": "Yes", "option_B": "No"}]"#,
    );
}

fn medvh(set: &DatasetFixture) {
    set.image("multi_choices/NOTA/medvh_1.jpg", (30, 30), 1).image(
        "multi_choices/wrongful_image/medvh_1.jpg",
        (30, 30),
        2,
    );
    set.image("text_generation/FCJ/medvh_1.jpg", (30, 30), 3).image(
        "text_generation/report_generation/medvh_1.jpg",
        (30, 30),
        4,
    );
    set.write(
        "multi_choices/test_NOTA_baseline.json",
        r#"[{"question_id": 0, "img_id": 1, "question": "what level is the hernia?", "img_name": "medvh_1.jpg",
             "choices": "A: severe. B: mild. C: None of the above.", "gt": "B", "correct_answer": "mild. "}]"#,
    );
    set.write(
        "multi_choices/test_wrongful_image.json",
        r#"[{"question_id": 0, "img_id": 1, "question": "Is there a rib fracture?", "img_name": "medvh_1.jpg",
             "choices": "A: Yes. B: No. C: This is not a suitable question for this image.", "gt": "C", "correct_answer": "No", "correct_gt": "B"},
            {"question_id": 1, "img_id": 2, "question": "?", "img_name": "medvh_2.jpg", "choices": "A: Yes. B: No.", "gt": "A"},
            {"question_id": 2, "img_id": 1, "question": "Which?", "img_name": "medvh_1.jpg", "choices": "A: Yes. B: No.", "gt": "E"}]"#,
    );
    set.write(
        "text_generation/test_FCJ.json",
        r#"[{"question_id": 0, "img_id": 1, "question": "Can a nodule be observed?", "img_name": "medvh_1.jpg", "choices": "A: Yes. B: No.",
             "correct_answer": "Yes", "gt": "A", "suggested_answer": "B: No."}]"#,
    );
    set.write(
        "text_generation/test_report_generation.json",
        r#"[{"report_id": 0, "src_img": "4ea0", "image_name": "medvh_1.jpg", "pos_labels": ["Cardiomegaly", "Lung Opacity"], "all_labels": []},
            {"report_id": 1, "src_img": "4ea1", "image_name": "medvh_1.jpg", "pos_labels": [], "all_labels": ["Edema"]}]"#,
    );
    set.write("multi_choices/NOTA/test_nota_src.json", "[]");
}

fn ms_swift(set: &DatasetFixture) {
    set.image("images/a.jpg", (200, 100), 1).image("images/b.jpg", (200, 100), 2);
    let lines = [
        r#"{"messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "<image>Describe the image."}, {"role": "assistant", "content": "<ref-object><bbox> and <ref-object><bbox> are seen"}], "images": ["images/a.jpg"], "objects": {"ref": ["a cyst", "a mass"], "bbox": [[31.5, 61.4, 53.5, 94.8], [76.5, 5.8, 99.5, 27.4]]}}"#,
        r#"{"messages": [{"role": "user", "content": "<image>Find the <ref-object> in the image"}, {"role": "assistant", "content": "<bbox><bbox>"}], "images": [{"path": "images/b.jpg"}], "objects": {"ref": ["stone"], "bbox": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1, 1]], "bbox_type": "norm1"}}"#,
        r#"{"messages": [{"role": "user", "content": "<image>Locate."}, {"role": "assistant", "content": "Here."}], "images": ["images/a.jpg"], "objects": "[{\"caption\": \"cyst\", \"bbox\": [100, 200, 300, 400], \"bbox_type\": \"norm_1000\", \"image\": 0}]"}"#,
        r#"{"messages": [{"role": "user", "content": "<image>Help me"}, {"role": "assistant", "content": "click(<bbox>)"}], "images": ["images/a.jpg"], "objects": {"ref": [], "bbox": [[615, 226]]}}"#,
        r#"{"messages": [{"role": "user", "content": "<image><image>Compare"}, {"role": "assistant", "content": "same"}], "images": ["images/a.jpg", "images/b.jpg"]}"#,
        r#"{"messages": [{"role": "user", "content": "<image>Is it normal?"}, {"role": "assistant", "content": "No."}], "images": ["images/b.jpg"]}"#,
        r#"{"messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}], "images": ["images/b.jpg"], "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}"#,
    ];
    set.write("train.jsonl", lines.join("\n"));
}

fn llava(set: &DatasetFixture) {
    set.image("part-000001/a.jpg", (30, 20), 1);
    set.write(
        "train.json",
        r#"[{"id": "997bb945", "image": "part-000001/a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is seen?"},
              {"from": "gpt", "value": "A nodule. "}, {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "At [0.1, 0.2, 0.3, 0.4]."}]},
            {"id": "text-only", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"id": "odd", "image": "part-000001/a.jpg", "conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hi"}]},
            {"id": "gone", "image": "part-000001/b.jpg", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]"#,
    );
}
