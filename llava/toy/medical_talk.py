"""What a tiny *medical* base reads beside its pictures: a radiology glossary, in short questions and answers.

Terms with the region they belong to and what kind of thing they are, written for this project from general knowledge.
They make the words of radiology readable and sayable for a base that is frozen afterwards; they hold no row of any
data set.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

REGIONS: dict[str, str] = {
    "head": """brain; skull; cerebellum; cerebrum; frontal lobe; parietal lobe; temporal lobe; occipital lobe;
        brainstem; midbrain; pons; medulla; thalamus; basal ganglia; caudate; putamen; internal capsule; corpus
        callosum; sulci; gyri; cortex; grey matter; white matter; gray-white matter junction; lateral
        ventricles; third ventricle; fourth ventricle; ventricles; cerebrospinal fluid; csf; cisterns; falx;
        tentorium; dura; meninges; subarachnoid space; subdural space; epidural space; sella; pituitary; pineal
        gland; choroid plexus; orbit; eye; globe; optic nerve; lens; sinus; maxillary sinus; frontal sinus;
        ethmoid sinus; sphenoid sinus; mastoid air cells; nasal cavity; nasal septum; middle cerebral artery;
        mca; anterior cerebral artery; posterior cerebral artery; pca; basilar artery; vertebral artery; carotid
        artery; circle of willis; superior sagittal sinus; scalp; calvarium; foramen magnum; sylvian fissure;
        interhemispheric fissure; hippocampus; insula; cerebral hemisphere; left hemisphere; right hemisphere;
        motor cortex; parotid gland; temporal bone; face; neck; suprasellar; periventricular; intraparenchymal;
        cerebellopontine angle""",
    "chest": """lung; lungs; heart; aorta; aortic arch; aortic knob; ascending aorta; descending aorta; pulmonary
        artery; pulmonary vein; superior vena cava; trachea; carina; bronchus; main bronchus; bronchi;
        bronchiole; alveoli; pleura; pleural space; costophrenic angle; costophrenic angles; cardiophrenic
        angle; diaphragm; hemidiaphragm; right hemidiaphragm; left hemidiaphragm; mediastinum; hilum; hila;
        right upper lobe; right middle lobe; right lower lobe; left upper lobe; left lower lobe; lingula; apex;
        lung apex; lung base; lung bases; lung field; lung fields; upper lung; lower lung; base of the right
        lung; upper lobe; middle lobe; lower lobe; right lung; left lung; bilateral lungs; interstitium; rib;
        ribs; clavicle; scapula; sternum; sternotomy wires; thoracic spine; shoulder; breast; left ventricle;
        right ventricle; left atrium; right atrium; cardiac silhouette; heart border; pericardium; coronary
        artery; esophagus; thymus; thyroid; lymph nodes; chest wall; vertebra; paratracheal; retrocardiac;
        subclavian; azygos""",
    "abdomen": """liver; spleen; kidney; kidneys; right kidney; left kidney; pancreas; pancreatic head; pancreatic tail;
        gallbladder; stomach; duodenum; small bowel; small intestine; large bowel; large intestine; colon;
        cecum; appendix; ascending colon; transverse colon; descending colon; sigmoid colon; rectum; bladder;
        urinary bladder; prostate; uterus; ovary; adrenal gland; ureter; renal pelvis; renal cortex; peritoneum;
        mesentery; omentum; retroperitoneum; pelvis; aorta; abdominal aorta; inferior vena cava; ivc; portal
        vein; superior mesenteric artery; sma; celiac trunk; renal artery; renal vein; splenic artery; splenic
        vein; hepatic vein; hepatic artery; bile duct; common bile duct; right lobe of the liver; left lobe of
        the liver; abdominal wall; psoas muscle; paraspinal muscles; lumbar spine; spinal cord; vertebral body;
        subcutaneous fat; fat; bowel; jejunum; ileum; gastric antrum; falciform ligament; hepatic flexure;
        splenic flexure; right lower quadrant; left lower quadrant; right upper quadrant; left upper quadrant;
        iliac artery; femur; hip""",
}
FINDINGS: dict[str, str] = {
    "head": """stroke; ischemic stroke; infarct; infarction; lacunar infarct; hemorrhage; haemorrhage; intracranial
        hemorrhage; subarachnoid hemorrhage; subdural hematoma; epidural hematoma; hematoma; tumor; tumour;
        brain tumor; glioma; glioblastoma; meningioma; metastasis; metastases; edema; cerebral edema; vasogenic
        edema; midline shift; mass effect; herniation; hydrocephalus; atrophy; brain atrophy; aneurysm;
        arteriovenous malformation; multiple sclerosis; demyelination; abscess; encephalitis; meningitis; skull
        fracture; contusion; ring enhancing lesion; ring enhancement; hyperintensity; hypointensity;
        enhancement; restricted diffusion; cyst; arachnoid cyst; calcification; sinusitis; mucosal thickening;
        pneumocephalus; acute stroke; chronic infarct; toxoplasmosis; lymphoma; dilated ventricles; enlarged
        ventricles; blunting of the sulci""",
    "chest": """pneumonia; pneumothorax; tension pneumothorax; pleural effusion; effusion; atelectasis; consolidation;
        infiltrate; infiltrates; opacity; opacities; opacification; nodule; nodules; pulmonary nodule; mass;
        lung mass; cancer; lung cancer; cavity; cavitary lesion; emphysema; copd; fibrosis; interstitial lung
        disease; pulmonary edema; edema; congestion; vascular congestion; cardiomegaly; enlarged heart; enlarged
        cardiac silhouette; heart failure; pulmonary embolism; tuberculosis; sarcoidosis; granuloma;
        lymphadenopathy; hilar lymphadenopathy; pneumomediastinum; pneumoperitoneum; free air; air under the
        diaphragm; rib fracture; fracture; scoliosis; kyphosis; hyperinflation; flattened diaphragm; blunting of
        the costophrenic angle; widened mediastinum; tracheal deviation; aortic aneurysm; calcification;
        calcified; hiatal hernia; foreign body; reticular opacities; ground glass; air bronchogram; bullae;
        volume loss; scarring; hemothorax""",
    "abdomen": """cyst; cysts; renal cyst; hepatic cyst; stone; stones; kidney stone; nephrolithiasis; gallstones;
        cholelithiasis; cholecystitis; appendicitis; appendicolith; diverticulitis; diverticulosis; colitis;
        pancreatitis; pseudocyst; ascites; free fluid; fluid collection; free air; abscess; liver abscess;
        hepatomegaly; splenomegaly; cirrhosis; fatty liver; hepatocellular carcinoma; hemangioma; metastasis;
        metastases; liver metastases; adenocarcinoma; carcinoma; tumor; mass; hydronephrosis; pyelonephritis;
        renal mass; angiomyolipoma; polycystic kidneys; bowel obstruction; small bowel obstruction; ileus;
        volvulus; intussusception; hernia; inguinal hernia; fat stranding; wall thickening; bowel wall
        thickening; perforation; aneurysm; abdominal aortic aneurysm; dissection; thrombosis; infarct; splenic
        infarct; laceration; hematoma; adenopathy; lymphadenopathy; calcification; calcified atherosclerosis;
        varices; pneumatosis; retained contrast; stranding; inflammation""",
}
IMAGING = """ct; ct scan; mri; x-ray; xray; plain film; plain film x-ray; radiograph; chest x-ray; ultrasound;
        angiogram; ct angiogram; cta; ct with contrast; contrast ct; non-contrast ct; noncontrast; iv contrast;
        oral contrast; gi contrast; iv and oral contrast; with contrast; without contrast; barium; gadolinium;
        t1; t1 weighted; t2; t2 weighted; t2 weighted mri; flair; mri flair; diffusion; diffusion weighted
        imaging; diffusion weighted; dwi; adc; adc map; pet; fluoroscopy; mammography; mr angiography; pa; ap;
        pa view; ap view; lateral; lateral view; anteroposterior; posteroanterior; posterior-anterior; portable;
        supine; upright; erect; standing; axial; axial plane; coronal; coronal plane; sagittal; transverse;
        cross section; oblique; lung window; bone window; soft tissue window; arterial phase; venous phase;
        bright; dark; black; white; grey; gray; hyperdense; hypodense; isodense; hyperintense; hypointense;
        hyperattenuating; hypoattenuating; attenuated; radiolucent; radiopaque; lucent; opaque; homogeneous;
        heterogeneous; enhancing"""
DESCRIPTIONS = """yes; no; left; right; left side; right side; on the left; on the right; the left; the right; both;
        bilateral; bilaterally; both sides; unilateral; midline; central; peripheral; upper; lower; middle; top;
        bottom; anterior; posterior; anteriorly; posteriorly; superior; inferior; medial; lateral; proximal;
        distal; anterolateral; posterolateral; apical; basal; diffuse; focal; multifocal; localized; scattered;
        single; multiple; one; two; three; four; five; six; seven; eight; nine; ten; 1; 2; 3; 4; 5; 6; 7; 8; 10;
        12; several; many; none; small; large; big; medium; enlarged; dilated; narrow; wide; thickened; thin;
        normal; abnormal; mild; moderate; severe; marked; acute; chronic; subacute; benign; malignant; cystic;
        solid; round; oval; irregular; well-circumscribed; lobulated; smooth; spiculated; ring enhancing;
        calcified; fluid; air; fluid filled; air-fluid level; blood; bone; soft tissue; muscle; water; gas;
        metal; fat; vascular; infectious; inflammatory; neoplastic; congenital; traumatic; degenerative;
        symmetric; asymmetric; symmetrical; sharp; blunted; elevated; flattened; displaced; deviated; collapsed;
        compressed; obstructed; ruptured; male; female; man; woman; child; adult; elderly; cannot tell; not
        sure; nothing; not seen; not visible; cardiovascular; respiratory; digestive; nervous system;
        gastrointestinal; urinary; neurological; cardiopulmonary; hepatobiliary; musculoskeletal; less than 5
        cm; 1 cm; 2 cm; 3 cm; 5 cm; 5mm; more than 6 cm; above; below; behind; in front of; next to; adjacent
        to; surrounding; within; near; between; to the left of; to the right of; in the lung; in the liver; in
        the brain; in the kidney; in the chest; in the abdomen; in the right lobe; in the left lobe; tubes;
        tube; catheter; central line; chest tube; endotracheal tube; nasogastric tube; pacemaker; clips;
        surgical clips; stent; screws; wires; leads; ekg leads; port; drain; prosthesis; smoking; trauma;
        infection; hypertension; cancer; surgery; diabetes; pain; cough; fever; biopsy; chemotherapy;
        antibiotics; drainage; resection; observation; shunt; perfusion; ischemia; necrosis; inflammation"""


def split_terms(text: str) -> list[str]:
    """The terms of a list above."""
    return [" ".join(term.split()) for term in text.split(";") if term.strip()]


def medical_terms() -> list[str]:
    """Every term once, in the order of the lists."""
    lists = [*REGIONS.values(), *FINDINGS.values(), IMAGING, DESCRIPTIONS]
    return list(dict.fromkeys(term for text in lists for term in split_terms(text)))


class MedicalText:
    """Draws questions about the glossary that need no picture."""

    def __init__(self) -> None:
        self.terms = medical_terms()
        self.structures = [(term, region) for region, text in REGIONS.items() for term in split_terms(text)]
        self.findings = [(term, region) for region, text in FINDINGS.items() for term in split_terms(text)]

    def ask(self, rng: np.random.Generator) -> tuple[str, str]:
        """One question with its answer."""
        kind = rng.random()
        if kind < 0.5:
            term = self.terms[int(rng.integers(len(self.terms)))]
            verb = ("Say", "Repeat", "Write", "Name")[int(rng.integers(4))]
            return f"{verb} {term}.", term
        if kind < 0.65:
            term, region = self.structures[int(rng.integers(len(self.structures)))]
            return f"Where in the body is the {term}?", region
        if kind < 0.8:
            term, region = self.findings[int(rng.integers(len(self.findings)))]
            return f"Where in the body is {term} seen?", region
        return self._choose(rng)

    def _choose(self, rng: np.random.Generator) -> tuple[str, str]:
        """One of two terms, told by its region or its kind."""
        pool = self.structures if rng.random() < 0.5 else self.findings
        first, second = (pool[int(i)] for i in rng.integers(len(pool), size=2))
        what = "part" if pool is self.structures else "finding"
        if first[1] != second[1]:
            term, region = (first, second)[int(rng.integers(2))]
            return f"{first[0]} or {second[0]}: which is a {what} of the {region}?", term
        word = ("first", "last")[int(rng.integers(2))]
        return f"{first[0]} or {second[0]}: say the {word}.", (first if word == "first" else second)[0]


def sayable_pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of a vocabulary that are text of their own (a byte of a longer character is not), sorted."""
    special = set(tokenizer.all_special_ids)
    texts = {str(tokenizer.decode([number])) for number in tokenizer.get_vocab().values() if number not in special}
    return sorted(text for text in texts if text.isascii() and text.isprintable() and text.strip())


def spell(pieces: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """A made-up word or phrase of one to four random tokens, to be repeated.

    A frozen output layer can only be steered to tokens that it has learned to tell apart. This makes the base say each
    of them, so that offsets can later reach answers whose words its own training never asked for.
    """
    text = "".join(pieces[i] for i in rng.integers(len(pieces), size=int(rng.integers(1, 5)))).strip()
    return f"Say {text}.", text
